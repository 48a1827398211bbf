"use strict";
const form = document.getElementById("filter");
if (form) {
  const cards = [...document.querySelectorAll(".finding")];
  const update = () => {
    const chosen = new FormData(form);
    const severities = chosen.getAll("severity");
    const part = chosen.get("module").trim().toLowerCase();
    let shown = 0;
    for (const card of cards) {
      const fits = severities.includes(card.dataset.severity)
        && (!chosen.get("family") || chosen.get("family") === card.dataset.family)
        && (!part || card.dataset.modules.includes(part));
      card.hidden = !fits;
      shown += fits;
    }
    document.getElementById("shown").textContent = `${shown} of ${cards.length}`;
  };
  form.addEventListener("input", update);
  form.addEventListener("submit", (event) => event.preventDefault());
  update();
}
for (const button of document.querySelectorAll(".copy")) {
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(button.previousElementSibling.textContent);
    button.textContent = "Copied";
  });
}
window.addEventListener("beforeprint", () => document.querySelectorAll(".finding").forEach((card) => { card.open = true; }));
