"""Every wire: framing, messages and authentication."""
