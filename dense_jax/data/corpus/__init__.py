"""Text at corpus scale: tokenized once into shards, and read at random from then on."""
