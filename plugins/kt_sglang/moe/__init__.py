"""The MoE layers of this process: their registry, which expert runs where, and one token recomputed in float32."""
