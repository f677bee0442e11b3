"""AutoDistil: see `method`."""




