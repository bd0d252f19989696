"""The operator's page: rendered on the server, readable without JavaScript, live with a little of it."""
