"""Expert selection: one file per policy, pure functions of the routing and of what is known of the devices."""

from testbed.policies.base import DROPPED, Policy, Routing, Selection, State
from testbed.policies.loading import label, make_policy
from testbed.policies.topk import TopK
from testbed.policies.wlr import WLR

__all__ = ["DROPPED", "WLR", "Policy", "Routing", "Selection", "State", "TopK", "label", "make_policy"]
