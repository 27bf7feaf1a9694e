"""What the benchmarks share; a benchmark imports from here, never from another benchmark.

results: where result files go and what every one records. cases: choose cases, run Python in a process. published:
configs and shapes of the 6B checkpoints. checkpoints: random checkpoints and adapters on disk. random_models: random
models in memory. stock_glm: the baselines, transformers' own model. train_steps: encode, run and profile training.
"""
