"""What a control means and what a PID becomes."""
