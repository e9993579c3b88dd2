"""Quality beside latency: lm-evaluation-harness on the model whose experts are on the nodes."""
