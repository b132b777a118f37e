"""A vision language model as a reward: prompt templates, pictures for it, protocols, its training and its checks."""
