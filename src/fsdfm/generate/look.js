const $ = id => document.getElementById(id);

const colour = (call, total) => {
  // From blue, the first call, to red, the last: what moved last is the warmest.
  const share = total > 1 ? (call - 1) / (total - 1) : 0;
  const low = getComputedStyle(document.documentElement).getPropertyValue("--low");
  return `hsl(${Math.round(225 - 215 * share)} 70% ${low.trim()})`;
};

const legend = total => {
  $("legend").textContent = "moved last in call";
  for (const call of [...new Set([1, Math.ceil((1 + total) / 2), total])]) {
    const patch = document.createElement("i");
    patch.style.background = colour(call, total);
    $("legend").append(patch, String(call));
  }
};
