"""The HTTP edge: OpenAI's API in front of a fleet of replicas. The only room that knows HTTP."""
