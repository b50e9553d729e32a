"""Acting: a policy and a task give rollouts, episodes and replays."""
