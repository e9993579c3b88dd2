"""A distributed model that stands and answers, for whoever brings the prompts."""
