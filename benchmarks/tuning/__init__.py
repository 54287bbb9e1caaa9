"""What tuning costs, and what it is compared with."""
