"""How a policy answers: the Ray Serve deployment, HTTP, batching, variants, decision log, dashboard page."""
