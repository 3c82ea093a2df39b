"""Pocket: a little text-to-image family trained from nothing on a little painted world with exact ground truth."""
