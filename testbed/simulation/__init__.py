"""What a run would take, computed: the analytic model over routing and channel draws. No socket, no waiting."""
