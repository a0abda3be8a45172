"""Benchmarks of the engine, and of any server that speaks OpenAI's API.

workloads.py    what is asked: lengths, prompts, when each request comes
client.py       one streamed request over HTTP, and the times of what came back
online.py       a workload against a server
offline.py      a workload against an engine in this process
figures.py      from times to rates, percentiles, goodput
plots.py        the same as curves
"""
