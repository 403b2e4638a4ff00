"""The page that the servers show in a browser: static files, and the routes that serve them."""
