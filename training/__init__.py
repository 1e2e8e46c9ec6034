"""How a policy is learned and judged: environments, rollouts, PPO, checkpoints, evaluation, gates. No Ray."""
