"""Loss, optimizer, train step, loop and checkpoints."""
