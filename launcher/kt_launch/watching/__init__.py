"""What looks at a running server: progress, health, memory, metrics, a page, and why it died."""
