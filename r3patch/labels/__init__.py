"""Labels: which scope a router was built in. No torch."""
