"""The life of a devbox: from the request for one until nothing of it is left."""
