"""Expert selection: one file per policy, pure functions of the routing and of what is known of the devices."""
