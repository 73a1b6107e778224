"""From a plan to a server that is started, proven and watched, and to the record of it."""
