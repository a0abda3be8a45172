"""Requests and responses, as OpenAI's API reference has them; what is ours on top of it comes from SamplingParams."""
