"""The KwaaiNet stack: the `/kwaai/*` protocols, and what its nodes write into their DHT."""
