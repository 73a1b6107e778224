"""The experts method that SGLang calls for every MoE layer, and the experts that are resident on the model's device."""
