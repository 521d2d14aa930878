"""Models of the server: what a configuration does under a workload."""
