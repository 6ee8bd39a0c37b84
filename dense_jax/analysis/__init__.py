"""What flows between layers."""
