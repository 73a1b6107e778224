"""kt-launch: what a user may write, what it resolves to, and what is started. Imports nothing on its own."""
