"""From a plan to a server that is started, proven and ended: in front, detached, or for a caller in Python."""
