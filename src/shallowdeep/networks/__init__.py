"""What runs: backbones, the sites where exits may sit, the exits, their costs, and the two joined."""
