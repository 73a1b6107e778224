"""From a plan to a server that is started, proven and ended; alone, detached, several, or one on several hosts."""
