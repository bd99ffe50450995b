"""The provider: proves and advertises its GPUs, admits leased jobs, serves them through its engines, meters, signs and bills."""
