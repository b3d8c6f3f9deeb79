-- Health of a RedisMigration for Argo CD: the value of `resource.customizations.health.redis-migration.io_RedisMigration`
-- in the ConfigMap argocd-cm. Argo CD runs it as Lua 5.1 with the object in `obj`.
--
-- Healthy: in sync and following, waiting for an approval, or completed.
local health = { status = "Progressing", message = "waiting for the operator" }
local status = obj.status
if status == nil or status.observedGeneration ~= obj.metadata.generation then
  return health
end

local conditions = {}
for _, condition in ipairs(status.conditions or {}) do
  conditions[condition.type] = condition
end
local function holds(name)
  return conditions[name] ~= nil and conditions[name].status == "True"
end
local function told(name)
  local condition = conditions[name]
  return condition.reason .. ": " .. condition.message
end

health.message = status.message
if holds("Finished") then
  if holds("Succeeded") then
    health.status = "Healthy"
  else
    health.status = "Degraded"
    if conditions.Succeeded ~= nil then
      health.message = told("Succeeded")
    end
  end
elseif holds("Stalled") then
  health.status = "Degraded"
  health.message = told("Stalled")
elseif status.phase == "Suspended" then
  health.status = "Suspended"
elseif holds("Degraded") then
  health.status = "Degraded"
  health.message = told("Degraded")
elseif holds("Ready") then
  health.status = "Healthy"
end
return health
