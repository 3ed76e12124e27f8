"""What runs in the controller."""
