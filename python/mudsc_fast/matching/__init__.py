"""The method: similarities in weight and activation space, matching node by node, applying the result."""
