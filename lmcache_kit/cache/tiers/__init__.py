"""The tiers below memory: their stores, and promotion back into memory."""
