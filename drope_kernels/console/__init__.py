"""What long commands have in common on a terminal: progress, and how a signal ends them."""
