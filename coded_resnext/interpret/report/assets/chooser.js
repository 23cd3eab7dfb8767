// The class that the whole page looks at: one chooser, with a search where there are many.

const manyClasses = 20;

function setUpChooser() {
  const select = byId("class-select");
  const fill = (indices) => {
    select.replaceChildren(...indices.map((index) =>
      html("option", { value: index, dir: "auto", text: plainName(index, 60) })));
    if (indices.includes(state.chosenClass)) select.value = state.chosenClass;
    else if (indices.length) choose({ chosenClass: indices[0], sample: null });
  };
  const all = classNames.map((_, index) => index);
  // To begin with a class that there is something to see of.
  const seen = results.paths ? Array.from(results.paths.samples_per_class).findIndex((count) => count > 0) : 0;
  state.chosenClass = Math.max(seen, 0);
  fill(all);
  select.addEventListener("change", () => choose({ chosenClass: Number(select.value), sample: null }));
  const step = (by) => {
    const options = Array.from(select.options, (option) => Number(option.value));
    if (!options.length) return;
    const next = options[(options.indexOf(state.chosenClass) + by + options.length) % options.length];
    choose({ chosenClass: next, sample: null });
  };
  byId("class-before").addEventListener("click", () => step(-1));
  byId("class-after").addEventListener("click", () => step(1));
  if (classNames.length > manyClasses) {
    const find = byId("class-find");
    byId("class-find-label").hidden = false;
    find.addEventListener("input", () => {
      const wanted = find.value.trim().toLowerCase();
      const found = all.filter((index) => classNames[index].toLowerCase().includes(wanted));
      byId("class-found").textContent = wanted ? `${found.length} found` : "";
      fill(found);
    });
  }
  onChoice(({ chosenClass }) => {
    if (![...select.options].some((option) => Number(option.value) === chosenClass)) {
      // Chosen elsewhere on the page while a search hides it.
      byId("class-find").value = "";
      byId("class-found").textContent = "";
      fill(all);
    }
    select.value = chosenClass;
  });
}
