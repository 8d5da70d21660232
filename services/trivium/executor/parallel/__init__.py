"""One model over several processes: who has what of it, how they add up, and who starts them."""
