"""What a server's processes need besides SGLang: secrets, names in /dev/shm, CPUs, progress and counts of messages."""
