"""From a checkpoint to a predictor folder that the runtime, a registry or a hub can hold."""
