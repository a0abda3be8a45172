"""Requests, as OpenAI's API reference has them; what is ours on top of it comes from SamplingParams.

Nothing is converted: a number in quotes is a string, as it is to OpenAI. What is not known is refused.
"""
