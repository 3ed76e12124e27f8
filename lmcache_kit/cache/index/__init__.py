"""The index: which chunks a tier holds, and what keeps them there."""
