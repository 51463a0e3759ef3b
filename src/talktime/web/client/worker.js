// Browsers slow the timers of hidden tabs down to one a minute, but not those of workers.
onmessage = ({ data: [id, ms] }) => setTimeout(postMessage, ms, id);
