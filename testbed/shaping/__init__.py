"""Rate shaping on real interfaces: shares of a total, enforced by the kernel where no radio is emulated.

Not spectrum: it holds back what this machine hands to an interface, and no link carries more than its air allows.
Not yet run on hardware: tested between network namespaces joined by veth.
"""

from testbed.shaping.htb import DownlinkShaper, UplinkShaper

__all__ = ["DownlinkShaper", "UplinkShaper"]
