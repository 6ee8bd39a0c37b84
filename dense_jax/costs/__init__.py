"""What a model does: what compiled programs cost a chip."""
