"""Which processes run: rollout workers, learner, controller, monitor, release manager."""
