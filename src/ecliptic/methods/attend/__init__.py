"""How a tower mixes its tokens: attention and softmax operators."""
