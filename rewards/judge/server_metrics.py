"""What a vLLM server counts, as numbers for a run's metrics."""

import math

from rewards.judge.exchange import Endpoint, Rejected, Unavailable, WrongAnswer, exchange

METRICS = {
    "vllm:num_requests_running": "running",
    "vllm:num_requests_waiting": "waiting",
    "vllm:kv_cache_usage_perc": "cache_used",
    "vllm:request_success_total": "answered",
    "vllm:prompt_tokens_total": "prompt_tokens",
    "vllm:prefix_cache_queries_total": "prefix_queries",
    "vllm:prefix_cache_hits_total": "prefix_hits",
    "vllm:num_preemptions_total": "preemptions",
    "vllm:e2e_request_latency_seconds_sum": "request_seconds",
}
"""vLLM's names and ours: questions in work and queued, share of the KV cache in use, and since the server's start:
questions answered, tokens read, tokens looked up and found in the prefix cache, preemptions, seconds of all
requests."""


def parse_metrics(text: str) -> dict[str, float]:
    """The numbers of :data:`METRICS` that a page in Prometheus' text format has, each summed over its label sets."""
    sums: dict[str, float] = {}
    for line in text.splitlines():
        name, _, rest = line.partition("{") if "{" in line else line.partition(" ")
        if (ours := METRICS.get(name)) is None:
            continue
        try:
            value = float(rest.rpartition("}")[2].split()[0])
        except (IndexError, ValueError):
            continue
        if math.isfinite(value):
            sums[ours] = sums.get(ours, 0.0) + value
    return sums


def server_metrics(endpoint: Endpoint, deadline_s: float = 5.0) -> dict[str, float]:
    """What a server counts now; empty where it does not say."""
    try:
        return parse_metrics(exchange(endpoint, "/metrics", None, deadline_s).decode(errors="replace"))
    except (Unavailable, WrongAnswer, Rejected):
        return {}
